#!/bin/sh
# Put a Compose 2 where the container tests look for it, unless docker has one: a package of the
# current stable Debian, unpacked and not installed. Its only dependency is the C library.
set -eu

folder=${XDG_CACHE_HOME:-$HOME/.cache}/dcgan-pipeline/docker/config/cli-plugins
PATH=/usr/bin:$PATH
if docker compose version 2>/dev/null | grep -q 'v\?2\.\(2[4-9]\|[3-9]\)' || [ -e "$folder/docker-compose" ]; then
  exit 0
fi
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# shellcheck disable=SC2016  # apt-get fills the field in, not the shell
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -v security | head -n 1)
mkdir -p "$work/lists/partial" "$work/archives/partial"
echo "deb $mirror stable main" >"$work/sources"
set -- -o Dir::Etc::SourceList="$work/sources" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$work/lists" \
  -o Dir::Cache="$work" -qq
apt-get "$@" update
cd "$work"
apt-get "$@" download docker-compose
dpkg-deb --extract docker-compose_*.deb "$work/unpacked"
mv "$work/unpacked/usr/libexec/docker/cli-plugins/docker-compose" "$folder/"

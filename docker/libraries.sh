#!/bin/sh
# Make an environment from a lock file: libraries.sh TORCH VENV [LOCK], for Dockerfile and Makefile.
#
# TORCH is cuda: all of the lock file (requirements.txt) with its hashes, CUDA libraries included.
# Else torch, torchvision and what only GPUs need are left out, the others keep their hashes, and
#   cpu                    the same versions come as PyTorch's CPU builds
#   "torch==2.15.0+cpu ..."  these come in their place
# The lock file has no hashes of CPU builds: they are not in the index that it was made from.
set -eu

torch=$1 venv=$2 lock=${3:-requirements.txt} uv=${UV:-uv}
gpu='^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)=='
[ -x "$venv/bin/python" ] || "$uv" venv --python "$(command -v python3)" "$venv"
if [ "$torch" = cuda ]; then
  exec "$uv" pip sync --python "$venv/bin/python" --require-hashes "$lock"
fi
others=$(mktemp)
trap 'rm -f "$others"' EXIT
awk -v gpu="$gpu" '/^[a-z]/ {left = $0 ~ gpu} !left' "$lock" >"$others"
"$uv" pip sync --python "$venv/bin/python" --require-hashes "$others"
[ "$torch" != cpu ] || torch=$(sed -nE 's/^(torch|torchvision)==([^ ]+) .*/\1==\2+cpu/p' "$lock")
# An index or a folder given as UV_INDEX or UV_FIND_LINKS stands in for PyTorch's own.
backend=--torch-backend=cpu
[ -z "${UV_INDEX:-}${UV_FIND_LINKS:-}" ] || backend=
# shellcheck disable=SC2086  # several words
"$uv" pip install --python "$venv/bin/python" --no-deps $backend $torch || {
  echo "PyTorch's CPU builds were not found. If its index is out of reach, name a mirror or a folder of wheels in" \
    "UV_INDEX or UV_FIND_LINKS, or take the builds with CUDA libraries: TORCH=cuda (6.9 GB)" >&2
  exit 1
}

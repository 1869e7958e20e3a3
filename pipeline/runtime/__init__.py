"""Handle the process and its peers: launch, ranks, signals, files, messages. Knows no GAN."""

"""Check the laws of the key, the matcher and the config on a fuzzer's inputs."""

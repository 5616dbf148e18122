"""Servers, SDKs and libraries that other people wrote, each as it is, with the plugin."""

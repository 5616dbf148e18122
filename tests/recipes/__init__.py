"""The plugin with unchanged servers, SDKs and libraries of other authors."""

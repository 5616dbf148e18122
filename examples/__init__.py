"""What users copy: a session server and its settings. Each file needs the package alone."""

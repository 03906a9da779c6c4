"""Small applications, each run by a test; see README.md in this folder for what each teaches."""

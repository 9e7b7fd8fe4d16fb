"""The `m2f-video` command: one file per subcommand, each of which parses, calls the library and prints."""

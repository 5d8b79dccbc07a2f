"""The commands that draw and convert, each in a module of its own."""

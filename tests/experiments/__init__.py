"""The experiments behind the tables in docs/: a file per table, which can be run again."""

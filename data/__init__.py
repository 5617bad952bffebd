"""Data sets: the table of public sets, the built-in ones, and tools that make or mend masks."""

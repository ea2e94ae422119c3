"""The experiments that the book records: as data, as records, as a command."""

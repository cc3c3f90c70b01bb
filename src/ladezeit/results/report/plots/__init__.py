"""The report's pictures, one module each, drawn from the objects that the tables are written from."""

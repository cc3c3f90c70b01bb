"""Writers of the formats that some engines read."""

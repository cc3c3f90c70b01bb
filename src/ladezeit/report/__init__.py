"""Results as words, tables, pictures and documents."""

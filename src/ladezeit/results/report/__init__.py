"""One document for whoever has to decide: the verdict, tables, pictures, and everything needed to check them."""

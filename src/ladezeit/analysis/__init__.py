"""Statistics on results: comparison, ranks, decision. No text, no pictures, no torch."""

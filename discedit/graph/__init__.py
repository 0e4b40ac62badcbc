"""Which channels belong together, and whether their removal is what hiding them would be."""

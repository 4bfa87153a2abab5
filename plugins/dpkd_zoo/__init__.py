"""The built-in losses: one file, one name, one entry point each."""

"""What goes: importances, budgets, rankings."""

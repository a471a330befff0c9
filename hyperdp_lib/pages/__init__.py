"""Records to tables, verdicts, figures: what the book and the README show."""

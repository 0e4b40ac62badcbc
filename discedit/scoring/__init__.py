"""From moments to scores, and how sure they are."""

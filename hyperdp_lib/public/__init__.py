"""Public data only: task sources and training. Nothing here ever sees a private image."""

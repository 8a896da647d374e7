"""The problems and their contenders, a family a module; each has `subjects()`."""

"""What is built, and what builds it, is no test."""

collect_ignore = ["_build", "_ext", "conf.py", "gallery"]

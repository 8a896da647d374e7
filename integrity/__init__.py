"""What derivatives and failures of difflayers and its peers are worth. `python -m integrity` runs the table."""

"""What the command line shows and asks: options, error lines, progress bars, tables, one-shot generation, the chat.

``click_cli.py`` parses and calls; nothing below the command line imports this package.
"""

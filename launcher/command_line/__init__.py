"""The command line of a recipe: words and files to options, help, words of other trainers."""

"""The models that ship with the package, each in a folder in the Hugging Face layout."""

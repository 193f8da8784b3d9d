"""How the embedded models were made: books → corpus, tokenizer → training → the folders in `models/embedded`. See README.md."""

"""The register tiles and the LLVM vector code they are written in."""

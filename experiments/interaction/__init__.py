"""The interaction operator of a mixer: what its rank, its heads and its reach are."""

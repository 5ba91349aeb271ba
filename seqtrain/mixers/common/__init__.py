"""What mixers share: the base class, families, and the recurrences that conversions use too."""

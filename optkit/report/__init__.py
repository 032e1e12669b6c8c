"""Reports for readers, made from the validator's document."""

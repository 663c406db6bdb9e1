"""What scores images: feature networks, the judge, the records of evaluations."""

"""What one stage hands to the next: small frozen records, some of which are kept as files."""

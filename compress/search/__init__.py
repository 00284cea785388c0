"""Search: how many units each layer keeps, found by trying candidates and measuring what each says."""

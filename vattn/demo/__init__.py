"""Generate text with a vattn cache, compare it with the stock one, and draw what memory did."""

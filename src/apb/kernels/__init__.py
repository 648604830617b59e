"""The arithmetic: attention of some rows over several key/value segments, and the merge of partial results."""

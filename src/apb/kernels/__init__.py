"""Attention of query rows over several key/value segments, the merge of partial results, and selection."""

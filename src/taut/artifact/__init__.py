"""What a result is on disk: folders that load again, exports, comparisons."""

"""From a constitution to a distilled persona."""

"""Find out why a training went wrong, prove it by replay, cure it and go on."""

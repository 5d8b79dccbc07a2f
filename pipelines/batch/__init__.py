"""Many pictures, and the record that each picture keeps of how it was drawn."""

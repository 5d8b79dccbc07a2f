"""The commands of the command line that train, look after data and measure."""

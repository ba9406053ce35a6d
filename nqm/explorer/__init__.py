"""Controls over one experiment: SGD until T0, then a method with members or averages."""

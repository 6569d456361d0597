"""What load runs are made of: clients, scenarios, statistics, watches of the machine, rows."""

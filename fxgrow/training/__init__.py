"""Growth while a network trains: schedules, the grower, its history."""

collect_ignore = ["tasks"]  # somebody else's project: imported from its own folder, as `tasks`

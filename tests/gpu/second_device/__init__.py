"""A second device type on the CPU, named "second": see device.cpp. What uses it runs in a process of its own."""

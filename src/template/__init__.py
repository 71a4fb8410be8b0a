"""Yours: what is trained, and how. Read it in half an hour, change it without fear; the library is `downslope`."""

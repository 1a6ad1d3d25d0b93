"""The machines: how ranks are started, meet, talk and end."""

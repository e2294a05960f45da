"""rescom_timm: long-tailed image recognition with ResCom on any timm backbone."""

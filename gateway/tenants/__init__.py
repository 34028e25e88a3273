"""The tenants: who they are, and the links and QR codes they hand out."""
